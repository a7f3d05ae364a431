"""What ``gpu`` runs that no other command measures, each a process of its own."""
