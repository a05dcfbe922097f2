"""How the server's scheduler does under load: simulated on tables of latencies, and measured."""
