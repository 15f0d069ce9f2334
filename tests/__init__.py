"""The tests mirror the package; `zoo` holds what they train, `oracle` what they compare it with."""
