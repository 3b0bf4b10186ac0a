"""What the services stand on: events, the message log, providers, RPC, the web."""

import warnings

# nameko needs eventlet, and whoever runs a command of ours can do nothing about it
warnings.filterwarnings("ignore", message=r"\s*Eventlet is deprecated")
