"""What tests of several files share: small models, inputs, comparisons and processes; fixtures are in conftest.py."""
