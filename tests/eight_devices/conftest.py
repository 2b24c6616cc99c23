"""These files need eight devices: ``tests/test_eight_devices.py`` runs each of them.

By hand: XLA_FLAGS=--xla_force_host_platform_device_count=8 pytest tests/eight_devices
"""

import jax

collect_ignore_glob = ["test_*.py"] if jax.device_count() < 8 else []
