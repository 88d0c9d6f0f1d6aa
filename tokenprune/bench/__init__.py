"""Speed at real size, beside what the device allows."""
