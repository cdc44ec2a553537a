"""Side by side with the peers' own released code."""
