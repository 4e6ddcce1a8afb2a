"""What the experts of a trained run see and serve: counted, judged, and shown as table, page,
picture and JSON."""
