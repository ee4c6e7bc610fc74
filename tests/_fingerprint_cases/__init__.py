"""What the fingerprint tests work on."""
