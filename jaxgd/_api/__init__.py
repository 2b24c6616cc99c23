"""What you call: arguments in, a plan made, a driver run, a result out."""
