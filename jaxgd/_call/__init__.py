"""From words to a plan: arguments checked, the functions of the user tried."""
