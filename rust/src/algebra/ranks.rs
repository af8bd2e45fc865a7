//! Rules that choose how many singular values of each module are kept.

use serde_json::Value;

use crate::error::{Error, Result};

/// How far a share may fall short and still count as reached, so that rounding does not decide.
const SHARE_TOLERANCE: f64 = 1e-9;
/// Entries of the largest table that the exact solution of a budget may take.
const EXACT_ENTRIES: u64 = 1 << 27;

/// What is asked for of the ranks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Rule {
    /// So many for each module; where there are fewer, zeros are added.
    Fixed(u64),
    /// Those above what the rounding of the stored numbers explains.
    Auto,
    /// The least number whose squares are this share of all.
    Energy(f64),
    /// The least number for which √(Σ_{i>k}σ²/Σσ²) is at most this.
    Error(f64),
    /// Those above σ₁ over this.
    SvRatio(f64),
    /// The least number with √(Σ_{≤k}σ²/Σσ²) of at least this: an energy of its square.
    SvFro(f64),
    /// The least number with Σ_{≤k}σ/Σσ of at least this.
    SvCumulative(f64),
    /// The best ranks of all modules together within a sum.
    Budget(Measure, u64),
}

/// What a budget counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Measure {
    /// The sum of ranks.
    Ranks,
    /// Elements of the factors.
    Parameters,
    /// Bytes of the factors.
    Bytes,
}

impl Measure {
    /// What it counts, in a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ranks => "ranks",
            Self::Parameters => "parameters",
            Self::Bytes => "bytes",
        }
    }
}

/// The forms that a rule is given in, for messages.
const FORMS: &str = "a number, \"auto\", \"energy:0.95\", \"error:0.01\", \"sv_ratio:20\", \
     \"sv_fro:0.95\", \"sv_cumulative:0.9\", \"budget:ranks=512\", \"budget:parameters=2000000\" or \
     \"budget:bytes=20MB\"";

impl Rule {
    /// Reads a rule: a number or a text.
    ///
    /// # Errors
    /// [`Error::Argument`] for what is none.
    pub fn parse(value: &Value) -> Result<Self> {
        let wrong = |why: &str| Error::Argument(format!("rank is {value}{why}; it is {FORMS}"));
        let of_number = |number: u64| match number {
            0 => Err(wrong(", which would leave nothing")),
            number if number > u64::from(u32::MAX) => Err(wrong("")),
            number => Ok(Self::Fixed(number)),
        };
        let text = match value {
            Value::Number(number) => return number.as_u64().map_or(Err(wrong("")), of_number),
            Value::String(text) => text.trim(),
            _ => return Err(wrong("")),
        };
        if text == "auto" {
            return Ok(Self::Auto);
        }
        if let Ok(number) = text.parse() {
            return of_number(number);
        }
        let (name, amount) = text.split_once(':').ok_or_else(|| wrong(""))?;
        if name == "budget" {
            let (what, amount) = amount.split_once('=').ok_or_else(|| wrong(""))?;
            let (measure, amount) = match what {
                "ranks" => (Measure::Ranks, whole(amount)),
                "parameters" => (Measure::Parameters, whole(amount)),
                "bytes" => (Measure::Bytes, bytes(amount)),
                _ => return Err(wrong("")),
            };
            let amount = amount.filter(|amount| *amount > 0).ok_or_else(|| wrong(""))?;
            return Ok(Self::Budget(measure, amount));
        }
        let number: f64 = amount.parse().map_err(|_| wrong(""))?;
        let share = |rule: fn(f64) -> Self| match number > 0.0 && number <= 1.0 {
            true => Ok(rule(number)),
            false => Err(wrong(", and a share lies above 0 and at most at 1")),
        };
        match name {
            "energy" => share(Self::Energy),
            "sv_fro" => share(Self::SvFro),
            "sv_cumulative" => share(Self::SvCumulative),
            "error" if (0.0..1.0).contains(&number) => Ok(Self::Error(number)),
            "error" => Err(wrong(", and an error lies from 0 to below 1")),
            "sv_ratio" if number >= 1.0 && number.is_finite() => Ok(Self::SvRatio(number)),
            "sv_ratio" => Err(wrong(", and σ₁/σ is at least 1")),
            _ => Err(wrong("")),
        }
    }

    /// How many of a module's singular values, descending, are kept; `floor` is what rounding explains.
    /// A module that is not zero keeps at least one. Budgets are not chosen module by module.
    pub fn choose(self, values: &[f64], floor: f64, is_kohya: bool) -> usize {
        let first = values.first().copied().unwrap_or(0.0);
        if first == 0.0 {
            return 0;
        }
        let relative = || values.iter().map(move |value| value / first);
        let squares = || relative().map(|value| value * value);
        let reaching = |terms: &mut dyn Iterator<Item = f64>, target: f64| {
            let mut sum = 0.0;
            for (index, term) in terms.enumerate() {
                sum += term;
                if sum >= target * (1.0 - SHARE_TOLERANCE) {
                    return index + 1;
                }
            }
            values.len()
        };
        let energy = |share: f64| reaching(&mut squares(), share * squares().sum::<f64>());
        let found = match self {
            Self::Fixed(number) => values.len().min(number as usize),
            Self::Auto => values.iter().filter(|value| **value > floor).count(),
            Self::Energy(share) => energy(share),
            Self::Error(error) => {
                let total: f64 = squares().sum();
                let mut tail = 0.0;
                let small = squares().rev().take_while(|square| {
                    tail += square;
                    tail <= error * error * total * (1.0 + SHARE_TOLERANCE)
                });
                values.len() - small.count()
            }
            Self::SvRatio(ratio) => relative().filter(|value| *value > 1.0 / ratio).count(),
            Self::SvFro(share) => energy(share * share),
            Self::SvCumulative(share) => reaching(&mut relative(), share * relative().sum::<f64>()),
            Self::Budget(..) => values.len(),
        };
        // kohya's older `resize_lora.py` keeps one more than its rules say, and never fewer than two.
        let is_dynamic = matches!(self, Self::SvRatio(_) | Self::SvFro(_) | Self::SvCumulative(_));
        match is_kohya && is_dynamic {
            true => (found + 1).min(values.len()),
            false => found.max(1),
        }
    }
}

fn whole(text: &str) -> Option<u64> {
    let number: f64 = text.replace('_', "").parse().ok()?;
    (number.fract() == 0.0 && (0.0..1e18).contains(&number)).then_some(number as u64)
}

/// A number of bytes, as `20MB` or `4 MiB`.
fn bytes(text: &str) -> Option<u64> {
    const UNITS: [(&str, u64); 8] = [
        ("kib", 1 << 10),
        ("mib", 1 << 20),
        ("gib", 1 << 30),
        ("kb", 1000),
        ("mb", 1_000_000),
        ("gb", 1_000_000_000),
        ("b", 1),
        ("", 1),
    ];
    let lower = text.trim().to_ascii_lowercase();
    let (number, unit) = UNITS.iter().find_map(|(name, unit)| {
        let number = lower.strip_suffix(name)?.trim().parse::<f64>().ok()?;
        Some((number, *unit))
    })?;
    let all = number * unit as f64;
    (all.is_finite() && (0.0..1e18).contains(&all)).then_some(all as u64)
}

/// One module, for a budget.
#[derive(Debug, Clone)]
pub(crate) struct Candidate {
    /// What each of its singular triplets is worth, descending.
    pub worth: Vec<f64>,
    /// What each of them costs.
    pub cost: u64,
}

/// The ranks that a budget gives.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Spent {
    /// Of each module.
    pub ranks: Vec<usize>,
    /// What the budget was spent on.
    pub cost: u64,
    /// By how much the worth of what is kept can at most fall short of the best that there is.
    pub gap: f64,
}

/// The ranks with the greatest sum of worth within a budget: exactly, where all triplets cost the same,
/// where the best value for its price spends all of it, or where the table of a knapsack is small;
/// else what the best value for its price gives, with a bound of what is missed.
pub(crate) fn within(candidates: &[Candidate], budget: u64) -> Spent {
    let mut items: Vec<(usize, f64, u64)> = Vec::new();
    for (index, candidate) in candidates.iter().enumerate() {
        let worth = candidate.worth.iter().filter(|worth| **worth > 0.0);
        items.extend(worth.map(|worth| (index, *worth, candidate.cost)));
    }
    // A module's triplets stay in their order: they cost the same and are worth less and less.
    items.sort_by(|x, y| (y.1 * x.2 as f64).total_cmp(&(x.1 * y.2 as f64)));
    let mut ranks = vec![0; candidates.len()];
    let mut closed = vec![false; candidates.len()];
    let (mut cost, mut gap) = (0, 0.0);
    let mut bound_left = None;
    for (index, worth, own) in &items {
        if closed[*index] {
            continue;
        }
        if cost + own <= budget {
            cost += own;
            ranks[*index] += 1;
            gap -= if bound_left.is_some() { *worth } else { 0.0 };
        } else {
            closed[*index] = true;
            // No choice is worth more than what was taken so far and the rest at this price.
            bound_left.get_or_insert_with(|| {
                gap = worth / *own as f64 * (budget - cost) as f64;
            });
        }
    }
    let spent = Spent { ranks, cost, gap: gap.max(0.0) };
    if spent.gap == 0.0 {
        return spent;
    }
    let mut costs: Vec<u64> = items.iter().map(|item| item.2).collect();
    costs.dedup();
    if costs.iter().all(|cost| *cost == costs[0]) {
        return Spent { gap: 0.0, ..spent };
    }
    exact(candidates, budget).unwrap_or(spent)
}

/// The solution of the knapsack by a table over all sums, where that is small enough.
fn exact(candidates: &[Candidate], budget: u64) -> Option<Spent> {
    let unit = candidates.iter().map(|one| one.cost).fold(0, divisor);
    let capacity = (budget / unit.max(1)) as usize;
    let items: u64 = candidates.iter().map(|one| one.worth.len() as u64).sum();
    if items.checked_mul(capacity as u64 + 1)? > EXACT_ENTRIES {
        return None;
    }
    let mut best = vec![0.0f64; capacity + 1];
    // How many triplets of each module the best choice with each sum has.
    let mut taken = Vec::with_capacity(candidates.len());
    for candidate in candidates {
        let cost = (candidate.cost / unit) as usize;
        let mut own = vec![0u32; capacity + 1];
        let before = best.clone();
        let mut sum = 0.0;
        for (count, worth) in candidate.worth.iter().enumerate() {
            sum += worth;
            let spent = cost * (count + 1);
            if spent > capacity || *worth <= 0.0 {
                break;
            }
            for place in spent..=capacity {
                let value = before[place - spent] + sum;
                if value > best[place] {
                    best[place] = value;
                    own[place] = count as u32 + 1;
                }
            }
        }
        taken.push(own);
    }
    let mut place = capacity;
    let mut ranks = vec![0; candidates.len()];
    let mut cost = 0;
    for (index, own) in taken.iter().enumerate().rev() {
        ranks[index] = own[place] as usize;
        let spent = candidates[index].cost * u64::from(own[place]);
        cost += spent;
        place -= (spent / unit) as usize;
    }
    Some(Spent { ranks, cost, gap: 0.0 })
}

fn divisor(one: u64, other: u64) -> u64 {
    if other == 0 { one } else { divisor(other, one % other) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const VALUES: [f64; 4] = [64.0, 32.0, 16.0, 4.0];

    fn rank(rule: &str) -> [usize; 2] {
        let rule = Rule::parse(&json!(rule)).expect("a rule");
        [false, true].map(|is_kohya| rule.choose(&VALUES, 0.0, is_kohya))
    }

    #[test]
    fn rules_choose_what_their_definitions_say_and_kohya_one_more() {
        let table: [(&str, usize, usize); 16] = [
            ("energy:0.75", 1, 1),
            ("energy:0.9", 2, 2),
            ("energy:0.95", 3, 3),
            ("energy:0.99", 3, 3),
            ("energy:0.999", 4, 4),
            ("sv_fro:0.85", 1, 2),
            ("sv_fro:0.95", 2, 3),
            ("sv_fro:0.99", 3, 4),
            ("sv_fro:0.9999", 4, 4),
            ("sv_cumulative:0.5", 1, 2),
            ("sv_cumulative:0.8", 2, 3),
            ("sv_cumulative:0.9", 3, 4),
            ("sv_cumulative:0.97", 4, 4),
            ("sv_ratio:3", 2, 3),
            ("sv_ratio:5", 3, 4),
            ("sv_ratio:20", 4, 4),
        ];
        for (rule, own, kohya) in table {
            assert_eq!(rank(rule), [own, kohya], "{rule}");
        }
        assert_eq!(rank("error:0"), [4, 4]);
        assert_eq!(rank("error:0.06"), [3, 3]);
        assert_eq!(rank("error:0.99"), [1, 1]);
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        for wrong in ["", "0", "-1", "1.5", "energy:0", "energy:1.1", "error:1", "sv_ratio:0.5"] {
            assert!(Rule::parse(&json!(wrong)).is_err(), "{wrong}");
        }
        for wrong in ["budget:ranks", "budget:ranks=0", "budget:bytes=1.5TB", "energy", "nan:1"] {
            assert!(Rule::parse(&json!(wrong)).is_err(), "{wrong}");
        }
        for wrong in [json!(0), json!(-3), json!(2.5), json!(null), json!(true)] {
            assert!(Rule::parse(&wrong).is_err(), "{wrong}");
        }
        let parsed = |text: &str| Rule::parse(&json!(text)).expect("a rule");
        assert_eq!(parsed("16"), Rule::Fixed(16));
        assert_eq!(parsed("budget:bytes=20MB"), Rule::Budget(Measure::Bytes, 20_000_000));
        assert_eq!(parsed("budget:bytes=1.5MiB"), Rule::Budget(Measure::Bytes, 3 << 19));
        assert_eq!(parsed("budget:ranks=512"), Rule::Budget(Measure::Ranks, 512));
    }

    #[test]
    fn the_knapsack_of_the_reference_is_solved() {
        let candidates: Vec<Candidate> =
            [(8, &[10.0, 6.0, 1.0][..]), (16, &[9.0, 8.0, 2.0]), (6, &[5.0, 4.0])]
                .into_iter()
                .map(|(cost, values)| Candidate {
                    worth: values.iter().map(|value| value * value).collect(),
                    cost,
                })
                .collect();
        assert_eq!(within(&candidates, 36), Spent { ranks: vec![1, 1, 2], cost: 36, gap: 0.0 });
        assert_eq!(within(&candidates, 46), Spent { ranks: vec![1, 2, 1], cost: 46, gap: 0.0 });
    }

    /// The best worth over all choices.
    fn brute_force(candidates: &[Candidate], budget: u64) -> f64 {
        let Some((first, rest)) = candidates.split_first() else { return 0.0 };
        let mut best = 0.0f64;
        for count in 0..=first.worth.len() {
            let cost = first.cost * count as u64;
            if cost <= budget {
                let worth: f64 = first.worth[..count].iter().sum();
                best = best.max(worth + brute_force(rest, budget - cost));
            }
        }
        best
    }

    proptest! {
        #[test]
        fn budgets_are_spent_as_well_as_can_be(
            modules in prop::collection::vec((1u64..9, prop::collection::vec(0.0f64..9.0, 0..5)), 1..5),
            budget in 1u64..60,
        ) {
            let candidates: Vec<Candidate> = modules
                .into_iter()
                .map(|(cost, mut worth)| {
                    worth.sort_by(|x, y| y.total_cmp(x));
                    Candidate { worth, cost }
                })
                .collect();
            let spent = within(&candidates, budget);
            let worth: f64 = (candidates.iter().zip(&spent.ranks))
                .map(|(one, rank)| one.worth[..*rank].iter().sum::<f64>())
                .sum();
            let cost: u64 =
                candidates.iter().zip(&spent.ranks).map(|(one, rank)| one.cost * *rank as u64).sum();
            prop_assert_eq!(cost, spent.cost);
            prop_assert!(cost <= budget);
            let best = brute_force(&candidates, budget);
            prop_assert!(worth + spent.gap >= best - 1e-9, "{} and {} against {}", worth, spent.gap, best);
            prop_assert!(spent.gap > 0.0 || worth >= best - 1e-9);
        }
    }
}
