"""What carries packets between server and sites. The algorithm itself knows of none of them."""
