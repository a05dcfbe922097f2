"""torch-tensorrt as it could build for the ``tensorrt`` engine: `make torch-tensorrt` installs it and runs this."""
