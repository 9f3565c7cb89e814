"""Run a client with the drop-in installed."""

from fastprior.dropin.installation import main

main()
