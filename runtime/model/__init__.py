"""What a mixture is: experts, routers, locator, and the repertoire that holds them on disk."""
