"""The service: keeps models alive on a device and answers HTTP."""
