"""The method as the paper's authors published it: training through the UNet, decoder, views, and official files."""
