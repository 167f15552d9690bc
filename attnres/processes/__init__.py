"""What can befall a process: signals that stop it, other processes that are lost, too little memory."""
