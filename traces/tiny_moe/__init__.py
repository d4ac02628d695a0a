"""The trained tiny MoE that moeflow ships."""
