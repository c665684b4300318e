//! The errors of this crate: settings and saved states that cannot be used.

/// Why a controller could not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting is out of its range or contradicts another one.
    #[error("batch-size setting `{setting}` is {value}, expected {expected}; {remedy}")]
    Setting {
        /// Path of the setting, as in `rule.stages[1].batch`.
        setting: String,
        /// What it is.
        value: String,
        /// What it must be.
        expected: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// A saved state does not fit the settings it is resumed with.
    #[error("saved batch-size state: `{field}` is {value}, expected {expected}; {remedy}")]
    State {
        /// Field of [`State`](crate::State).
        field: &'static str,
        /// What it is.
        value: String,
        /// What it must be.
        expected: String,
        /// What to do about it.
        remedy: &'static str,
    },
}

impl Error {
    /// Checks that a setting is a factor with which, or with the square of which, batches stay finite.
    pub(crate) fn unless_factor(setting: &str, value: f64, remedy: &'static str) -> Result<(), Self> {
        match (1e-6..=1e6).contains(&value) {
            true => Ok(()),
            false => Err(Self::setting(setting, value, "a number from 1e-6 to 1e6", remedy)),
        }
    }

    /// The error of one setting.
    pub(crate) fn setting(
        setting: impl Into<String>,
        value: impl ToString,
        expected: impl Into<String>,
        remedy: &'static str,
    ) -> Self {
        Self::Setting { setting: setting.into(), value: value.to_string(), expected: expected.into(), remedy }
    }
}
