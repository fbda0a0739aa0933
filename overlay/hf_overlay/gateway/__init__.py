"""The loopback Hub that answers for the user's models and passes everything else on."""
