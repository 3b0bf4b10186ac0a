"""What tests outside of this project need, too."""
