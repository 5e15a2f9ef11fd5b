#!/usr/bin/env python
"""dk-make-testdev-submission, from a clone."""

from dk_detectron.commands.make_testdev_submission import main

if __name__ == "__main__":
    main()
