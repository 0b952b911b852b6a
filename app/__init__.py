"""The service: keeps models alive on a device and answers HTTP. Imports training only where long work starts."""
