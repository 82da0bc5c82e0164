import { defineConfig } from "vitest/config";

export default defineConfig({ test: { environment: "jsdom", include: ["tests/web/**/*.test.js"], testTimeout: 30_000 } });
