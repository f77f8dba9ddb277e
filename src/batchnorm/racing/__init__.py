"""The race: contenders train the same network under the same rules; who needs how many steps and seconds?"""
