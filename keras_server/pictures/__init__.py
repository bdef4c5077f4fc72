"""What a picture's file asks for, found by a look at its bytes before anything is decoded."""
