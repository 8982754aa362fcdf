"""The forward KL of a frozen student head from means that the teacher has left."""
