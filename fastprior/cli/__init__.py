"""The command line: `fastprior`."""
