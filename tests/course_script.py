"""The course module's training script in our words: a small CNN on random 28x28 images, plain PyTorch throughout.

tests/test_course_script.py runs it as it stands and with two lines swapped.
"""

import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

EPOCHS, BATCH_SIZE, IMAGES, CLASSES = 1, 32, 500, 10


def conv_block(inputs: int, outputs: int) -> nn.Module:
    """Convolution, batch norm and ReLU; the image keeps its size."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class DigitCNN(nn.Module):
    """Two convolution blocks, each halved by max-pooling, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_block(1, 32), nn.MaxPool2d(2), conv_block(32, 64), nn.MaxPool2d(2))
        self.classifier = nn.Sequential(nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


torch.manual_seed(0)
model = DigitCNN()
data = TensorDataset(torch.randn(IMAGES, 1, 28, 28), torch.randint(0, CLASSES, (IMAGES,)))
loader = DataLoader(data, BATCH_SIZE, shuffle=True)
criterion = nn.CrossEntropyLoss()
optimizer = optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)

losses = []  # of every step
for epoch in range(EPOCHS):
    model.train()
    for images, labels in loader:
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"epoch {epoch + 1}: mean loss {sum(losses[-len(loader) :]) / len(loader):.4f}")
