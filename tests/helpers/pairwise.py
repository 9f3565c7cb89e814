"""Cases in which the values of every two options meet, without the product of all."""

from itertools import combinations, product


def pairwise(**options) -> list[tuple]:
    """As few cases as come easily, a value of each option, such that any two values of two options occur together.

    Each case starts from the first pair that is missing, and takes of every other option the value that adds most
    pairs, or the first of several such. The same options give the same cases.

    Args:
        options: the values of each, as in `pytest.mark.parametrize(list(options), pairwise(**options))`.
    """
    values = [list(given) for given in options.values()]
    if len(values) < 3:
        return list(product(*values))
    choices = [[(place, index) for index in range(len(given))] for place, given in enumerate(values)]
    missing = {pair: None for one, other in combinations(choices, 2) for pair in product(one, other)}  # in this order
    cases = []
    while missing:
        case = dict(next(iter(missing)))
        for place, given in enumerate(choices):
            if place not in case:
                gains = [sum(tuple(sorted((choice, made))) in missing for made in case.items()) for choice in given]
                case[place] = gains.index(max(gains))
        for pair in combinations(sorted(case.items()), 2):
            missing.pop(pair, None)
        cases.append(tuple(given[case[place]] for place, given in enumerate(values)))
    return cases
