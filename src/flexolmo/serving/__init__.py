"""Gateway: who may use which source, for what, until when, with proof. No torch."""
