// What web/ uses of ComfyUI's front end, which ships no types for extensions.
declare module "*/scripts/app.js" {
  export const app: any;
}
declare module "*/scripts/api.js" {
  export const api: any;
}
