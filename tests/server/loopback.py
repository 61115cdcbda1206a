"""What the server of the tests serves."""

BASE = "org/tiny"
TENANTS = ("sql", "poet", "clerk")
