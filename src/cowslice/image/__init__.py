"""One open disk: finding what an image names, mapping guest bytes to host bytes, and reading them."""
