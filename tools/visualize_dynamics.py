#!/usr/bin/env python
"""dk-visualize-dynamics, from a clone."""

from dk_detectron.commands.visualize_dynamics import main

if __name__ == "__main__":
    main()
