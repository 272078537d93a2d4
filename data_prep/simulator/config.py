"""The config of a simulated recording: sensor and scene."""

from dataclasses import dataclass

from evspan.conf.errors import require

CLASSES = ("ball", "box", "bar")  # class_id 0, 1, 2
LARGEST_SENSOR = 2048  # EVT3 addresses have 11 bits
RANGES = {  # smallest and largest value
    "hot_pixels": (0, 100_000),
    "hot_pixel_hz": (0, 5000),
    "speed": (0.2, 5),
    "object_contrast": (0.1, 3),
    "background_contrast": (0, 5),
    "background_texture": (0, 1),
    "clutter": (0, 1000),
    "ego_speed": (0, 1000),
}


@dataclass(kw_only=True)
class SimulatorConfig:
    """Sensor and scene. The defaults: a Gen4 sensor with 2 to 5 million events a second."""

    height: int = 720
    width: int = 1280
    min_objects: int = 2  # at once
    max_objects: int = 8
    min_scale: float = 1.0  # of an object's size, drawn for each
    max_scale: float = 1.0
    stop_fraction: float = 0.3  # of the objects, which stop on their way
    contrast_threshold: float = 0.2  # change of log intensity that makes an event
    threshold_mismatch: float = 0.03  # standard deviation over the pixels, relative
    refractory_us: int = 200  # after an event a pixel fires none for this time
    noise_hz: float = 0.2  # background events per pixel
    step_us: int = 2000  # between two renderings; event times in between are interpolated
    hot_pixels: int = 0  # pixels that fire without a cause, at random places
    hot_pixel_hz: float = 100.0  # mean rate of a hot pixel; each has its own
    speed: float = 1.0  # factor on the speeds of the objects
    object_contrast: float = 1.0  # factor on the log intensities of the objects
    background_contrast: float = 1.0  # factor on those of the background's blotches
    background_texture: float = 0.0  # log intensity of a fine texture of the background
    clutter: int = 0  # plain patches in the background
    # Largest speed of the background, in pixels per second: the camera sways, and all of the
    # background fires. 0: it is at rest.
    ego_speed: float = 0.0
    min_rest_s: float = 1.0  # of a stop, in seconds
    max_rest_s: float = 2.2

    def __post_init__(self) -> None:
        require(
            160 <= self.height <= LARGEST_SENSOR and 160 <= self.width <= LARGEST_SENSOR,
            f"width {self.width} x height {self.height}: give 160 to {LARGEST_SENSOR} pixels each",
        )
        require(
            0 <= self.min_objects <= self.max_objects <= 50,
            f"min_objects {self.min_objects} and max_objects {self.max_objects}: "
            "give 0 to 50, the smaller first",
        )
        require(
            0.25 <= self.min_scale <= self.max_scale <= 2,
            f"min_scale {self.min_scale} and max_scale {self.max_scale}: "
            "give 0.25 to 2, the smaller first",
        )
        require(
            0.1 <= self.min_rest_s <= self.max_rest_s <= 60,
            f"min_rest_s {self.min_rest_s} and max_rest_s {self.max_rest_s}: give 0.1 to 60 s, the "
            "smaller first",
        )
        require(
            0 <= self.stop_fraction <= 1,
            f"stop_fraction is {self.stop_fraction}; give a fraction from 0 to 1",
        )
        require(
            0.05 <= self.contrast_threshold <= 2,
            f"contrast_threshold is {self.contrast_threshold}; give 0.05 to 2 (in log intensity)",
        )
        require(
            0 <= self.threshold_mismatch <= 0.2,
            f"threshold_mismatch is {self.threshold_mismatch}; give 0 to 0.2",
        )
        require(
            self.refractory_us >= 0, f"refractory_us is {self.refractory_us}; give 0 us or more"
        )
        require(
            0 <= self.noise_hz <= 50,
            f"noise_hz is {self.noise_hz}; give 0 to 50 events per pixel and second",
        )
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            require(low <= value <= high, f"{name} is {value}; give {low:g} to {high:g}")
        require(100 <= self.step_us <= 5000, f"step_us is {self.step_us}; give 100 to 5000 us")
