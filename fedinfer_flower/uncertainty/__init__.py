"""How sure a joint answer is: prediction sets, calibrated confidence, abstention."""
