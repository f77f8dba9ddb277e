"""``batchnorm bench``: our layers beside torch's, one by one (``layers``) and in whole networks (``networks``)."""
