"""What a result is worth: the paper's tables anew, and files for COCO's test-dev server."""
