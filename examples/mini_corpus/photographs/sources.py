"""The table of Debian packages that carry real photographs, and which of their files are photographs.

Every picture of these packages was looked at. Left out are drawings, renders, nearly flat pictures, smaller
copies, pictures with painted-in blur, and one photograph of a building that is also held out.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """One Debian package and the selection of its photographs.

    Paths are relative to `root`, a folder inside the package. `include` and `exclude` are patterns of
    `fnmatch.fnmatchcase` (a star crosses slashes). For a `root` that holds Qt resource files, the path of a
    photograph is `FILE.rcc!PATH/INSIDE`.
    """

    package: str
    version: str  # exactly this one: another version may hold other pictures
    sha256: str  # of the .deb
    split: str  # "train" or "heldout"; a package is never in both
    root: str
    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    licences: str = "debian"  # who states them: debian | krank | kde | readme, see licences.py
    debian_prefix: str = ""  # what the package's copyright file writes before the path

    @property
    def deb_name(self) -> str:
        """File name under which apt-get stores the package (the colon of an epoch is escaped)."""
        return f"{self.package}_{self.version.replace(':', '%3a')}_all.deb"


def _rcc(activity: str, folder: str, *names: str) -> tuple[str, ...]:
    """Patterns of photographs in the resource file of one GCompris activity."""
    path = f"{activity}.rcc!gcompris/src/activities/{activity}/resource/{folder}"
    return tuple(f"{path}{name}.webp" for name in names)


SOURCES = (
    Source(
        package="endless-sky-high-dpi",
        version="0.9.8-1",
        sha256="44170b9aad0ecc8f5a39d8c6b1af233100cfc6bc0bab2352d62fb014b5099164",
        split="train",
        root="usr/share/games/endless-sky/plugins/endless-sky-high-dpi",
        # Landscapes, cities, interiors; of the "scene" folder only what is a photograph.
        include=(
            "images/land/*.jpg",
            "images/scene/army0@2x.jpg",
            "images/scene/engine@2x.jpg",
            "images/scene/engine2@2x.jpg",
            "images/scene/loc5@2x.jpg",
            "images/scene/loc7@2x.jpg",
        ),
    ),
    Source(
        package="krank",
        version="0.7+dfsg2-4",
        sha256="9a3d16fe30cef98d18a4ed9049f879339d8840f8cc729136ce2e0c7dbee33042",
        split="train",
        root="usr/share/games/krank/levels/unera-backgrounds",
        include=("*.jpg",),
        exclude=(
            # the same picture as bonus-01.jpg
            "menu-scores1.jpg",
            # nearly flat blue
            "menu-play.jpg",
            "menu-sounds.jpg",
        ),
        licences="krank",
    ),
    Source(
        package="lomiri-wallpapers-16.04",
        version="20.04.0-2",
        sha256="a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
        split="train",
        root="usr/share/backgrounds",
        include=("*_by_*.jpg",),
        exclude=("analogpattern_*", "umang_*"),  # a pattern and a colour gradient
        debian_prefix="16.04/",
    ),
    Source(
        package="lomiri-wallpapers-20.04",
        version="20.04.0-2",
        sha256="d44e89b8473aafe64a5b678f014862dc31335aaaf18665c544d985d854f1a709",
        split="train",
        root="usr/share/backgrounds",
        include=("Kleiber_*.jpg",),
        debian_prefix="20.04/",
    ),
    Source(
        package="mate-backgrounds",
        version="1.26.0-1",
        sha256="7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
        split="train",
        root="usr/share/backgrounds/mate",
        include=("nature/*.jpg",),
    ),
    Source(
        package="plasma-workspace-wallpapers",
        version="4:5.27.5-2",
        sha256="32cd18b71c8c938a18b3b351f217c02ac590e323caa3cf322fbb875ce8892f8b",
        split="train",
        root="usr/share/wallpapers",
        include=tuple(
            f"{name}/contents/images/2560x1600.jpg"
            for name in (
                "BytheWater",
                "ColdRipple",
                "ColorfulCups",
                "EveningGlow",
                "FallenLeaf",
                "Grey",
                "Kite",
                "OneStandsOut",
                "Path",
                "summer_1am",
            )
        ),
        licences="kde",
    ),
    Source(
        package="scratch",
        version="1.4.0.6~dfsg1-6.1",
        sha256="36c582eb93110f64f06c4e685c41e933ccba2fa68db12f79b10bfe840b21fc10",
        split="train",
        root="usr/share/scratch",
        include=("Media/Backgrounds/*.jpg",),
        exclude=(
            # drawings
            "*/party-room.jpg",
            "*/room[123].jpg",
            "*/spotlight-stage.jpg",
            "*/woods-and-bench.jpg",
            "*/school2.jpg",
            "*/brick-wall1.jpg",
            "*/forest.jpg",
            # painted-in blur
            "*/chalkboard.jpg",
            "*/graffiti.jpg",
            "*/basketball-court1-?.jpg",
            # the Palais des Papes, which is held out below
            "*/castle.jpg",
        ),
    ),
    Source(
        package="gcompris-qt-data",
        version="3.1-2",
        sha256="e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f",
        split="heldout",
        root="usr/share/gcompris-qt/rcc",
        include=(
            *_rcc("erase", "", "*"),
            *_rcc("explore_farm_animals", "animals/", "*"),
            *_rcc("explore_world_animals", "animals/", "*"),
            *_rcc("explore_world_music", "music/", "*"),
            *_rcc("explore_monuments", "", "*"),
            *_rcc("clickgame", "", "sea?"),
            # the others of this activity are paintings
            *_rcc(
                "details",
                "image/",
                "Chenonceau_background",
                "EgeskovSlotSpejling_background",
                "EilanDonanCastle_background",
                "FanoeWindmill_background",
                "GizahPyramids_background",
                "Louvre_2007_02_24_c_background",
                "NDP_background",
                "Nagoya_background",
                "Neuschwanstein_background",
                "OperaSidney_background",
                "TajMahal_background",
                "TourEiffel_background",
                "TowerBridgeLondon_background",
            ),
            # the others of this activity are below 256 px or cut out on white
            *_rcc(
                "categorization",
                "images/",
                "alphabets/alphabets",
                "fishes/fish25",
                "monuments/victoriaMemorial",
                "numbers/numbers",
                "others/spoons",
                "renewable/windmill6",
                "tools/nailCutter",
            ),
        ),
        licences="readme",
    ),
)
