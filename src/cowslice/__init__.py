"""The qcow2 engine for Python."""
