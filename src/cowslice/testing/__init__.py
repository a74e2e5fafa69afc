"""What people who write a storage, a policy or a device need to prove it. Only tests import it."""
