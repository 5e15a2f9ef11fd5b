#!/usr/bin/env python
"""dk-visualize-kernels, from a clone."""

from dk_detectron.commands.visualize_kernels import main

if __name__ == "__main__":
    main()
