//! Groups of tensors, by their names, with learning rates and weight decay of their own.

use pillion_kernels::AdamW;
use pillion_runtime::{Optimizer, ShardUpdate, UnitSpec, update_by_adamw};
use serde::{Deserialize, Serialize};
use wildmatch::WildMatch;

/// Tensors whose names match a pattern.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// A name, in which `*` stands for anything and `?` for a character.
    pub pattern: String,
    /// What the learning rate is multiplied with.
    pub lr: Option<f64>,
    /// Weight decay, instead of the run's.
    pub decay: Option<f64>,
}

impl std::str::FromStr for Group {
    type Err = String;

    /// Reads `PATTERN:lr=X,decay=Y`, with one of the settings or both.
    fn from_str(text: &str) -> Result<Group, String> {
        let (pattern, settings) = text.rsplit_once(':').ok_or("write PATTERN:lr=X,decay=Y, such as *norm*:decay=0")?;
        let mut group = Group { pattern: pattern.to_owned(), lr: None, decay: None };
        for setting in settings.split(',') {
            let (name, value) = setting.split_once('=').ok_or_else(|| format!("`{setting}` is no lr=X or decay=Y"))?;
            let number: f64 = value.trim().parse().map_err(|_| format!("{name} = `{value}` is no number"))?;
            if !(0.0..=1e3).contains(&number) {
                return Err(format!("{name} {number} is out of range: between 0 and 1000"));
            }
            match name.trim() {
                "lr" if group.lr.is_none() => group.lr = Some(number),
                "decay" if group.decay.is_none() => group.decay = Some(number),
                _ => return Err(format!("`{name}` is neither lr nor decay, or given twice")),
            }
        }
        Ok(group)
    }
}

/// Checks that each group matches a tensor of the model.
///
/// # Errors
/// Names the group.
pub(crate) fn check(groups: &[Group], units: &[UnitSpec]) -> Result<(), String> {
    for group in groups {
        let pattern = WildMatch::new(&group.pattern);
        if !units.iter().flat_map(|unit| &unit.tensors).any(|tensor| pattern.matches(&tensor.name)) {
            return Err(format!(
                "--group {} matches no tensor: names are such as model.layers.0.mlp.up_proj.weight",
                group.pattern
            ));
        }
    }
    Ok(())
}

/// For each tensor of each unit, what is its own.
#[derive(Debug)]
pub(crate) struct Grouped {
    units: Vec<Vec<Own>>,
}

/// Of the last group that matches a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Own {
    lr: f64,
    decay: Option<f64>,
}

impl Grouped {
    pub(crate) fn new(groups: &[Group], units: &[UnitSpec]) -> Grouped {
        let patterns: Vec<_> = groups.iter().map(|group| (WildMatch::new(&group.pattern), group)).collect();
        let of_tensor = |name: &str| {
            let found = patterns.iter().rev().find(|(pattern, _)| pattern.matches(name));
            found.map_or(Own { lr: 1.0, decay: None }, |(_, group)| Own {
                lr: group.lr.unwrap_or(1.0),
                decay: group.decay,
            })
        };
        let of_unit = |unit: &UnitSpec| unit.tensors.iter().map(|tensor| of_tensor(&tensor.name)).collect();
        Grouped { units: units.iter().map(of_unit).collect() }
    }

    /// An update with these settings for what no group changes.
    pub(crate) fn adamw(&self, settings: AdamW) -> GroupedAdamW<'_> {
        GroupedAdamW { groups: self, settings }
    }
}

/// AdamW with the settings of groups.
pub(crate) struct GroupedAdamW<'g> {
    groups: &'g Grouped,
    settings: AdamW,
}

impl Optimizer for GroupedAdamW<'_> {
    fn states(&self) -> &'static [&'static str] {
        self.settings.states()
    }

    fn update(&self, shard: ShardUpdate<'_>) {
        let own = &self.groups.units[shard.unit];
        update_by_adamw(shard, |tensor, decays| {
            let Own { lr, decay } = own[tensor];
            let default = if decays { self.settings.weight_decay } else { 0.0 };
            AdamW {
                lr: (f64::from(self.settings.lr) * lr) as f32,
                weight_decay: decay.map_or(default, |decay| decay as f32),
                ..self.settings
            }
        });
    }

    fn writes_weights(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pillion_llama::config::Preset;

    #[test]
    fn groups_are_read_and_the_last_that_matches_counts() {
        let groups: Vec<Group> =
            ["*:decay=0.5", "*norm*:lr=2,decay=0", "*embed*:lr=0.1"].iter().map(|text| text.parse().unwrap()).collect();
        let units = Preset::named("tiny").unwrap().config().units();
        check(&groups, &units).unwrap();
        let Grouped { units: own } = Grouped::new(&groups, &units);
        assert_eq!(own[0], [Own { lr: 0.1, decay: None }]);
        assert_eq!(own[1][0], Own { lr: 2.0, decay: Some(0.0) });
        assert_eq!(own[1][1], Own { lr: 1.0, decay: Some(0.5) });
        let missing: Group = "layers.0.x:lr=1".parse().unwrap();
        assert!(check(&[missing], &units).unwrap_err().contains("layers.0.x matches no tensor"));
    }

    #[test]
    fn what_is_no_group_is_refused() {
        for wrong in ["a", "a:", "a:lr", "a:lr=x", "a:lr=-1", "a:lr=1,lr=2", "a:beta=1", "a:lr=inf"] {
            assert!(wrong.parse::<Group>().is_err(), "{wrong}");
        }
    }
}
