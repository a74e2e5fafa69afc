"""The command line: words, flags and exit codes, after qemu-img. It does not know how anything is done."""
