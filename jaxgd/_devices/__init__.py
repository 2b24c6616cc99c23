"""Where arrays are: layouts over devices and processes."""
