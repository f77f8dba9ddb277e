"""``python -m batchnorm`` is the command ``batchnorm``; torchrun starts it like this."""

from batchnorm.cli import main

if __name__ == "__main__":
    main()
