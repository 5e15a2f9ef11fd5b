#!/usr/bin/env python
"""dk-train-imagenet, from a clone."""

from dk_detectron.commands.train_imagenet import main

if __name__ == "__main__":
    main()
