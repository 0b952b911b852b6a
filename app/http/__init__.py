"""HTTP around the application: the protocol below it, the guard before it, the serving process."""
