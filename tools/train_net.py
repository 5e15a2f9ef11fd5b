#!/usr/bin/env python
"""dk-train, from a clone."""

from dk_detectron.commands.train_net import main

if __name__ == "__main__":
    main()
