#!/usr/bin/env python
"""dk-predict, from a clone."""

from dk_detectron.commands.predict import main

if __name__ == "__main__":
    main()
