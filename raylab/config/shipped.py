"""The recipes that ship, one full and one `smoke` for each task. Every one of them is a test case."""

from raylab.config.recipe import (
    ArdsRecipe,
    CovidNetModel,
    CovidnetRecipe,
    ImageData,
    Loop,
    Optim,
    Recipe,
    RecurrentModel,
    ResidualModel,
    Schedule,
    Search,
    SurrogateRecipe,
)
from raylab.errors import unknown

ARDS = ArdsRecipe(
    task="ards",
    model=RecurrentModel(name="gru", hidden=16, dropout=0.5),
    optim=Optim(lr=1e-3, weight_decay=0.1),
    schedule=Schedule(kind="cosine", warmup_steps=20),
    loop=Loop(epochs=20, global_batch_size=128, shards=8, ema_decay=0.98, checkpoint_steps=50),
    search=Search(
        space={
            "optim.lr": "loguniform(3e-4,3e-3)",
            "optim.weight_decay": "loguniform(1e-2,1.0)",
            "model.hidden": "choice(8,16,32)",
            "model.dropout": "uniform(0.3,0.7)",
        },
        points=({"optim.lr": 1e-3, "optim.weight_decay": 0.1, "model.hidden": 16, "model.dropout": 0.5},),
    ),
)

COVIDNET = CovidnetRecipe(
    task="covidnet",
    data=ImageData(size=224),
    model=CovidNetModel(name="covidnet", dropout=0.3),
    # the published recipe is Adam at 2e-5 with batch 8 and a factor of .7 on plateau (facts of COVID-Net's repository)
    optim=Optim(lr=2e-4, weight_decay=1e-2),
    schedule=Schedule(kind="plateau", warmup_steps=50, factor=0.7, patience=5),
    loop=Loop(epochs=22, global_batch_size=64, shards=8, ema_decay=0.99, checkpoint_steps=50),
    search=Search(
        space={
            "optim.lr": "loguniform(1e-5,1e-3)",
            "optim.weight_decay": "loguniform(1e-4,1e-1)",
            "model.dropout": "uniform(0.0,0.5)",
        },
        points=({"optim.lr": 2e-4, "optim.weight_decay": 1e-2, "model.dropout": 0.3},),
    ),
)

# What `tune` searches where the recipe's own space is of another model
SPACES: dict[str, Search] = {
    "boosting": Search(
        space={
            "model.learning_rate": "loguniform(2e-2,2e-1)",
            "model.trees": "choice(100,200,400)",
            "model.leaves": "choice(4,8,16)",
            "model.l2": "loguniform(1e-1,1e2)",
        },
        points=({"model.learning_rate": 0.05, "model.trees": 200, "model.leaves": 8, "model.l2": 10.0},),
    ),
    "logistic": Search(space={"model.l2": "loguniform(1e-1,1e4)"}, points=({"model.l2": 10.0},)),
    "last_pf": Search(space={"model.l2": "loguniform(1e-1,1e4)"}, points=({"model.l2": 10.0},)),
    "last_sf": Search(space={"model.l2": "loguniform(1e-1,1e4)"}, points=({"model.l2": 10.0},)),
}

SURROGATE = SurrogateRecipe(
    task="surrogate",
    model=ResidualModel(name="residual", hidden=192, layers=4),
    optim=Optim(lr=3e-3, weight_decay=1e-4),
    schedule=Schedule(kind="cosine", warmup_steps=100),
    loop=Loop(epochs=60, global_batch_size=512, shards=4, ema_decay=0.99, checkpoint_steps=500),
    search=Search(
        space={
            "optim.lr": "loguniform(5e-4,1e-2)",
            "model.hidden": "choice(96,192,384)",
            "model.layers": "randint(2,6)",
        },
        points=({"optim.lr": 3e-3, "model.hidden": 192, "model.layers": 4},),
    ),
)

RECIPES: dict[str, Recipe] = {
    "ards": ARDS,
    "ards-smoke": ARDS.model_copy(
        update={
            "model": RecurrentModel(name="gru", hidden=16),
            "loop": Loop(epochs=3, global_batch_size=64, shards=6, checkpoint_steps=5),
            "schedule": Schedule(kind="cosine"),
        }
    ),
    "surrogate": SURROGATE,
    "surrogate-smoke": SURROGATE.model_copy(
        update={
            "model": ResidualModel(name="residual", hidden=48, layers=2),
            "schedule": Schedule(kind="cosine"),
            "loop": Loop(epochs=4, global_batch_size=128, shards=4, checkpoint_steps=20),
        }
    ),
    "covidnet": COVIDNET,
    "covidnet-smoke": COVIDNET.model_copy(
        update={
            "data": ImageData(size=64),
            "model": CovidNetModel(name="covidnet", width=0.25, depth=0.4),
            "optim": Optim(lr=1e-3),
            "schedule": Schedule(kind="cosine"),
            "loop": Loop(epochs=3, global_batch_size=32, shards=4, checkpoint_steps=10),
        }
    ),
}


def shipped_recipe(task: str, smoke: bool = False) -> Recipe:
    name = f"{task}-smoke" if smoke else task
    if task.endswith("-smoke") or name not in RECIPES:
        raise unknown("task", task, [n for n in RECIPES if not n.endswith("-smoke")])
    return RECIPES[name]


def with_search_space(recipe: Recipe) -> Recipe:
    """The recipe with the search space of its model, where that is not the recipe's own."""
    own = SPACES.get(recipe.model.name)
    if own is None or recipe.search.space.keys() == own.space.keys():
        return recipe
    kept = recipe.search.model_dump(exclude={"space", "points"})
    return recipe.model_copy(update={"search": Search(space=own.space, points=own.points, **kept)})
