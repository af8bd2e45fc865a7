//! Adapters whose modules have common names: what each of these is, and whether another adapter's
//! belong to them.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::ops::Range;

use indexmap::{IndexMap, IndexSet};

use super::layout::{Layout, Part};
use super::parameter::{Lie, Misfit, Named, Parameter};
use crate::adapter::grammar;
use crate::checkpoint::names::common::{self, CommonName};

/// How many leading parts of names may be what two adapters differ by; models have up to four.
const LEADING_PARTS: usize = 8;
/// How many changes of leading parts are held against each other.
const CHANGES: usize = 64;

/// What a product or a part of one is told apart by.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    /// The common name of its parameter.
    pub name: String,
    /// Which of the parameter's experts it is.
    pub expert: Option<u64>,
    /// Which of the parts that lie below one another.
    pub slot: usize,
}

/// What leads from an adapter's names to those of a family.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub enum Change {
    /// Nothing.
    #[default]
    Same,
    /// Its names begin with this, the family's do not.
    Strip(String),
    /// The family's names begin with this, its own do not.
    Add(String),
}

impl Change {
    pub(super) fn apply(&self, full: &str) -> String {
        match self {
            Self::Same => full.to_owned(),
            Self::Strip(prefix) => full.strip_prefix(prefix.as_str()).unwrap_or(full).to_owned(),
            Self::Add(prefix) => format!("{prefix}{full}"),
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::Same => "as they stand".to_owned(),
            Self::Strip(prefix) => format!("without {prefix:?}"),
            Self::Add(prefix) => format!("behind {prefix:?}"),
        }
    }
}

/// A part of a product of one adapter, under the name that it has in its family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// The position of its product in [`Layout::parts`].
    pub part: usize,
    /// What it is told apart by.
    pub identity: Identity,
    /// (outputs, inputs) of it.
    pub shape: [u64; 2],
    /// Whether the product is transposed for that.
    pub is_transposed: bool,
    /// The outputs of the (transposed) product that it is; all, if none.
    pub outputs: Option<Range<u64>>,
}

/// How a layout's names are brought to a family's.
#[derive(Debug, Clone, Default)]
pub(super) struct Joining {
    pub change: Change,
    /// The layout's parts whose names are the family's as they stand, such as heads.
    kept: HashSet<usize>,
    /// Of flattened names: the family's, by the layout's part.
    flattened: Targets,
}

impl Joining {
    /// The family's name for a parameter.
    fn bare(&self, part: usize, name: &CommonName) -> String {
        match (&self.change, self.flattened.get(&part)) {
            (_, Some(name)) => name.clone(),
            (Change::Same, None) => name.bare.clone(),
            _ if self.kept.contains(&part) => name.bare.clone(),
            (change, None) => common::without_containers(&change.apply(&name.full)).to_owned(),
        }
    }
}

/// The scheme of names that have a component before them.
const BY_COMPONENT: &str = "(components)";
/// What stands before the names of a component of an image model, with dots and flattened.
const COMPONENTS: [(&str, &[&str]); 6] = [
    ("unet.", &["lora_unet_"]),
    ("transformer.", &["lora_unet_", "lora_transformer_", "lycoris_"]),
    ("diffusion_model.", &["lora_unet_"]),
    ("text_encoder.", &["lora_te_", "lora_te1_"]),
    ("text_encoder_2.", &["lora_te2_"]),
    ("text_encoder_3.", &["lora_te3_"]),
];

/// Adapters whose modules have common names.
#[derive(Debug, Default)]
pub(super) struct Family {
    parameters: HashMap<String, Parameter>,
    /// The family's names with all of their leading parts, and those of their ends that a name
    /// with fewer leading parts may be.
    tails: HashMap<String, IndexSet<String>>,
    /// Modules that have others beside them, and modules with the place of their block left out.
    parents: HashSet<String>,
    elsewhere: HashSet<(String, [u64; 2])>,
    blocks: HashSet<String>,
    shapes: HashSet<[u64; 2]>,
    bases: HashSet<String>,
    is_without_base: bool,
    replication: Option<Vec<(u64, u64)>>,
    unknown_order: Option<String>,
    /// One of its modules.
    example: String,
}

/// The family's names of some of a layout's parts, by their positions.
type Targets = HashMap<usize, String>;

impl Family {
    pub fn founded_by(layout: &Layout) -> Self {
        Self {
            replication: layout.replication.clone(),
            unknown_order: layout.unknown_order.clone(),
            example: layout.parts.first().map_or_else(String::new, |part| part.name.clone()),
            ..Self::default()
        }
    }

    /// How the parts of a layout are brought to the family's names.
    ///
    /// # Errors
    /// Why they are not, in words.
    pub fn joining(&self, layout: &Layout, named: &[Named]) -> Result<Joining, String> {
        if layout.replication != self.replication {
            return Err("the one repeats layers of its base (layer_replication), and the other \
                        does not or repeats others"
                .into());
        }
        if layout.unknown_order != self.unknown_order {
            let order = layout.unknown_order.as_ref().or(self.unknown_order.as_ref());
            return Err(format!(
                "the rows of the one are in {}, which only the base's numbers of heads tell how to \
                 undo; convert it with its base",
                order.map_or("another order", String::as_str)
            ));
        }
        // Only names with dots have ends.
        if layout.is_flattened && !self.tails.is_empty() {
            let joining = self.joining_flattened(layout, named);
            if joining.is_ok() || !named.iter().any(|one| self.has(one, &one.name.bare)) {
                return joining;
            }
        }
        let (mut is_shared, mut is_within_blocks) = (false, false);
        let mut left = Vec::new();
        let mut kept = HashSet::new();
        for (position, (part, one)) in layout.parts.iter().zip(named).enumerate() {
            match self.parameters.get(&one.name.bare).map(|known| known.lie(one)) {
                Some(Err(Misfit::Unknown)) => return Err(unknown_lie(part)),
                Some(_) => {
                    is_shared = true;
                    kept.insert(position);
                    is_within_blocks |= block_of(&one.name.bare).is_some();
                }
                None => left.push(one),
            }
        }
        // Of a model whose blocks have their names in common, other names are other modules.
        if !is_within_blocks {
            match self.changes(&left).as_slice() {
                [] => {}
                [change] => {
                    return Ok(Joining { change: change.clone(), kept, ..Joining::default() });
                }
                [one, other, ..] => {
                    return Err(format!(
                        "their modules can be brought together in several ways ({}: {}, or {})",
                        left[0].name.full,
                        one.describe(),
                        other.describe()
                    ));
                }
            }
        }
        if is_shared {
            return Ok(Joining::default());
        }
        self.disjoint(layout, named).map(|()| Joining::default())
    }

    fn has(&self, one: &Named, bare: &str) -> bool {
        self.parameters.get(bare).is_some_and(|known| known.lie(one).is_ok())
    }

    /// The changes of leading parts under which names that a layout has left are the family's, each
    /// of one shape; of several those alone that leave none.
    fn changes(&self, left: &[&Named]) -> Vec<Change> {
        let mut found = IndexMap::<Change, Option<Targets>>::new();
        for (position, one) in left.iter().enumerate() {
            let full = &one.name.full;
            let mut vote = |change: Change| {
                let target = common::without_containers(&change.apply(full)).to_owned();
                let Some(known) = self.parameters.get(&target) else { return };
                let targets = found.entry(change).or_insert_with(|| Some(HashMap::new()));
                match (targets.as_mut(), known.lie(one)) {
                    (Some(targets), Ok(_)) => drop(targets.insert(position, target)),
                    // Modules of other shapes are not the same ones.
                    _ => *targets = None,
                }
            };
            for (dot, _) in full.match_indices('.').take(LEADING_PARTS) {
                let (prefix, rest) = full.split_at(dot + 1);
                if !is_plain(prefix.trim_end_matches('.')) {
                    break;
                }
                // A name as some adapter has it: without what holds a language model, that of a tower
                // beside it would be taken for one of its own.
                let is_whole = |longer: &IndexSet<String>| longer.contains(rest);
                if rest.contains('.') && self.tails.get(rest).is_some_and(is_whole) {
                    vote(Change::Strip(prefix.to_owned()));
                }
            }
            for longer in self.tails.get(full).into_iter().flatten() {
                let prefix = &longer[..longer.len() - full.len()];
                if !prefix.is_empty() {
                    vote(Change::Add(prefix.to_owned()));
                }
            }
        }
        let mut found: Vec<(Change, Targets)> =
            found.into_iter().filter_map(|(change, targets)| Some((change, targets?))).collect();
        found.sort_by_key(|(_, targets)| Reverse(targets.len()));
        found.truncate(CHANGES);
        // Names that differ in containers alone lead to the same modules.
        let is_covered = |place: usize| {
            let own = &found[place].1;
            found.iter().enumerate().any(|(other, (_, targets))| {
                let is_more = (targets.len(), place) > (own.len(), other);
                other != place && is_more && own.iter().all(|(k, v)| targets.get(k) == Some(v))
            })
        };
        let mut kept: Vec<_> = (0..found.len()).filter(|place| !is_covered(*place)).collect();
        let is_whole = |place: &usize| found[*place].1.len() == left.len();
        if kept.iter().filter(|place| is_whole(place)).count() == 1 {
            kept.retain(is_whole);
        }
        kept.into_iter().map(|place| found[place].0.clone()).collect()
    }

    /// Flattened names are those of the family's that have these letters.
    fn joining_flattened(&self, layout: &Layout, named: &[Named]) -> Result<Joining, String> {
        let mut schemes = IndexMap::<&str, HashMap<String, Option<&str>>>::new();
        let mut fulls: Vec<_> = self.tails.iter().filter(|(full, _)| !full.is_empty()).collect();
        fulls.sort_by_key(|(full, _)| full.as_str());
        for (full, longer) in fulls {
            let Some(path) = full.strip_suffix(".weight") else { continue };
            for whole in longer {
                let omitted = &whole[..whole.len() - full.len()];
                // What stands before a component's names tells it in both.
                for (_, prefixes) in COMPONENTS.iter().filter(|(dotted, _)| *dotted == omitted) {
                    let names = schemes.entry(BY_COMPONENT).or_default();
                    let bare = common::without_containers(whole);
                    for prefix in *prefixes {
                        names.insert(format!("{prefix}{}", path.replace('.', "_")), Some(bare));
                    }
                }
                let names = schemes.entry(omitted).or_default();
                let bare = common::without_containers(whole);
                names
                    .entry(path.replace('.', "_"))
                    .and_modify(|other| *other = other.filter(|other| *other == bare))
                    .or_insert(Some(bare));
            }
        }
        let mut found = Vec::new();
        for scheme in schemes.values() {
            let mut joined = HashMap::new();
            for (position, (part, one)) in layout.parts.iter().zip(named).enumerate() {
                let candidates = grammar::candidates(&part.key);
                let bare = candidates.iter().find_map(|name| scheme.get(*name).copied().flatten());
                if let Some(bare) = bare.filter(|bare| self.has(one, bare)) {
                    joined.insert(position, bare.to_owned());
                }
            }
            let targets: HashSet<_> = joined.values().collect();
            if !joined.is_empty() && targets.len() == joined.len() && !found.contains(&joined) {
                found.push(joined);
            }
        }
        let most = found.iter().map(HashMap::len).max().unwrap_or(0);
        found.retain(|joined| joined.len() == most);
        match found.len() {
            0 => Err(self.nothing_shared(layout)),
            1 => Ok(Joining { flattened: found.remove(0), ..Joining::default() }),
            _ => Err(format!(
                "the flattened names of the one ({} and others) fit those of the other in several \
                 ways",
                layout.parts[0].name
            )),
        }
    }

    /// Whether a layout without any of the family's modules is known to have others of one model.
    fn disjoint(&self, layout: &Layout, named: &[Named]) -> Result<(), String> {
        if let Some(base) = &layout.base
            && !self.is_without_base
            && !self.bases.contains(base)
        {
            return Err(format!("{}, and they name different bases", self.nothing_shared(layout)));
        }
        let is_one_base = layout.base.as_ref().is_some_and(|base| self.bases.contains(base));
        let bare = || named.iter().map(|one| (one, one.name.bare.as_str()));
        let is_beside = bare()
            .filter_map(|(_, name)| parent_of(name))
            .any(|parent| self.parents.contains(parent));
        let is_elsewhere = bare().any(|(one, name)| {
            block_of(name).is_some_and(|block| self.elsewhere.contains(&(block.shape, one.shape)))
        });
        // The same modules under names that are not known would have the same shapes.
        let is_of_other_shapes = is_one_base
            && bare().any(|(_, name)| {
                block_of(name).is_some_and(|block| self.blocks.contains(block.stem))
            })
            && !named.iter().any(|one| self.shapes.contains(&one.shape));
        if is_beside || is_elsewhere || is_of_other_shapes {
            return Ok(());
        }
        Err(self.nothing_shared(layout))
    }

    fn nothing_shared(&self, layout: &Layout) -> String {
        let own = layout.parts.first().map_or("", |part| part.name.as_str());
        format!(
            "no module of the one is known to be one of the other ({} and {own} are among them)",
            self.example
        )
    }

    /// Adds the modules of a layout.
    pub fn add(&mut self, layout: &Layout, named: &[Named], joining: &Joining) {
        match &layout.base {
            Some(base) => drop(self.bases.insert(base.clone())),
            None => self.is_without_base = true,
        }
        for (position, one) in named.iter().enumerate() {
            let bare = joining.bare(position, &one.name);
            self.parents.extend(parent_of(&bare).map(str::to_owned));
            if let Some(block) = block_of(&bare) {
                self.blocks.insert(block.stem.to_owned());
                self.elsewhere.insert((block.shape, one.shape));
            }
            self.shapes.insert(one.shape);
            match self.parameters.get_mut(&bare) {
                None => drop(self.parameters.insert(bare.clone(), Parameter::of(one))),
                Some(known) if known.slots.len() == one.slots() => {
                    known.slots[one.slot()].get_or_insert(one.shape);
                }
                Some(_) => {}
            }
            if layout.is_flattened {
                continue;
            }
            let full = match joining.kept.contains(&position) {
                true => one.name.full.clone(),
                false => joining.change.apply(&one.name.full),
            };
            let cuts = full.match_indices('.').map(|(dot, _)| dot + 1).take(LEADING_PARTS);
            for cut in std::iter::once(0).chain(cuts) {
                if !is_plain(full[..cut].trim_end_matches('.')) {
                    break;
                }
                self.tails.entry(full[cut..].to_owned()).or_default().insert(full.clone());
            }
        }
    }

    /// The parts of a layout under the family's names, cut as the family has them.
    pub fn units(&self, layout: &Layout, named: &[Named], joining: &Joining) -> Vec<Unit> {
        let mut units = Vec::new();
        for (part, one) in named.iter().enumerate() {
            debug_assert!(part < layout.parts.len());
            let bare = joining.bare(part, &one.name);
            // What has another shape there is another module of the same name.
            let lie = self.parameters.get(&bare).and_then(|known| known.lie(one).ok());
            let Lie { is_transposed, cuts } = lie.unwrap_or_default();
            let [outputs, inputs] = one.shape;
            let [height, width] = if is_transposed { [inputs, outputs] } else { one.shape };
            if cuts.is_empty() {
                let (identity, shape) = (one.identity(&bare), [height, width]);
                units.push(Unit { part, identity, shape, is_transposed, outputs: None });
            }
            for (slot, cut) in cuts.into_iter().enumerate() {
                let identity = Identity { slot, ..one.identity(&bare) };
                let shape = [cut.end - cut.start, width];
                units.push(Unit { part, identity, shape, is_transposed, outputs: Some(cut) });
            }
        }
        units
    }
}

fn unknown_lie(part: &Part) -> String {
    format!(
        "nothing tells how {} of shape {:?} lies on what the other has of it",
        part.name, part.shape
    )
}

/// A leading part that is part of a name, not the place in a list of layers.
fn is_plain(prefix: &str) -> bool {
    !prefix.split('.').any(is_index)
}

fn is_index(part: &str) -> bool {
    !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit())
}

/// The module in which a parameter's module lies; none, if it lies in the model itself.
fn parent_of(bare: &str) -> Option<&str> {
    let (module, _) = bare.rsplit_once('.')?;
    module.rsplit_once('.').map(|(parent, _)| parent)
}

/// The first block that a parameter lies in.
struct Block<'a> {
    /// The name of the block's list.
    stem: &'a str,
    /// The parameter's name without the block's place.
    shape: String,
}

fn block_of(bare: &str) -> Option<Block<'_>> {
    let mut start = 0;
    for part in bare.split('.') {
        if is_index(part) {
            let (stem, rest) = (&bare[..start], &bare[start + part.len()..]);
            return Some(Block { stem, shape: format!("{stem}*{rest}") });
        }
        start += part.len() + 1;
    }
    None
}
